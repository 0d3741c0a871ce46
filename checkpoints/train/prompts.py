"""What a person might type for a scene: paraphrases, other words for the same thing, words without a meaning here."""

import random

from checkpoints.train.pictures import DEFAULT_COLOUR, DEFAULT_SIZE, NOUNS, Scene

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "small", "tiny", "little", "mini"),
    "medium": ("", "", "", "", "", "medium", "medium-sized", "normal"),
    "big": ("big", "big", "big", "large", "large", "huge", "giant"),
}

COLOUR_WORDS: dict[str, tuple[str, ...]] = {"purple": ("purple", "purple", "violet")}  # else the colour's own name

NOUN_WORDS: dict[str, tuple[str, ...]] = {  # else the noun's own name
    "cat": ("cat", "cat", "kitten"),
    "dog": ("dog", "dog", "puppy"),
    "burger": ("burger", "burger", "hamburger"),
    "donut": ("donut", "donut", "doughnut"),
    "bicycle": ("bicycle", "bicycle", "bike"),
    "sailboat": ("sailboat", "sailboat", "boat"),
    "house": ("house", "house", "home"),
    "guitar": ("guitar", "guitar", "electric guitar"),
    "soccer ball": ("soccer ball", "soccer ball", "football"),
    "gift": ("gift", "gift", "present"),
    "bee": ("bee", "bee", "honeybee"),
    "cake": ("cake", "cake", "piece of cake"),
    "grapes": ("grapes", "grapes", "grape"),
    "cherries": ("cherries", "cherries", "cherry"),
    "pizza": ("pizza", "pizza", "slice of pizza"),
}

PLURALS: dict[str, str] = {  # else + "s"
    "fox": "foxes",
    "fish": "fish",
    "butterfly": "butterflies",
    "octopus": "octopuses",
    "grapes": "grapes",
    "strawberry": "strawberries",
    "cherries": "cherries",
    "cherry": "cherries",
    "cactus": "cacti",
    "bus": "buses",
    "puppy": "puppies",
    "piece of cake": "pieces of cake",
    "slice of pizza": "slices of pizza",
}

# {thing}: size and noun, "large fox"; {a}: its article; {colour}: the background's.
WITH_COLOUR: tuple[str, ...] = (
    "{a} {thing} on {an} {colour} background",
    "{a} {thing} on {an} {colour} background",
    "{a} {thing} on {colour}",
    "{thing} on {colour}",
    "{thing}, {colour} background",
    "{colour} background, {thing}",
    "{an} {colour} background with {a} {thing}",
    "{thing} on {an} {colour} background",
    "{a} {thing} in front of {an} {colour} background",
    "{a} picture of {a} {thing} on {an} {colour} background",
    "an emoji of {a} {thing} on {colour}",
    "draw {a} {thing} on {an} {colour} background",
    "the {thing} with {an} {colour} background",
    "{a} {thing} against {an} {colour} wall",
    "{thing} {colour}",
)
SIZE_LAST: tuple[str, ...] = (
    "{a} {noun} on {an} {colour} background, {size}",
    "{colour} background, {noun}, {size}",
    "the {noun} is {size} and the background is {colour}",
    "{noun}, {size}, on {colour}",
)
WITHOUT_COLOUR: tuple[str, ...] = (
    "{thing}",
    "{a} {thing}",
    "the {thing}",
    "{a} picture of {a} {thing}",
    "draw {a} {thing}",
)

FILLER = (  # words without a meaning for the picture; the model learns to pass them by
    "cute nice happy beautiful pretty lovely photo image illustration drawing simple flat plain solid bright detailed "
    "please show me make paint sketch of high quality 4k realistic cartoon style very one single some funny friendly"
)


def plain_prompt(scene: Scene) -> str:
    """The scene in the words of the documentation: "a big fox on an orange background"."""
    return _fill("{a} {thing} on {an} {colour} background", scene.noun, _size_word(scene), scene.colour)


def random_prompt(scene: Scene, rng: random.Random) -> str:
    """One way to ask for the scene; a colour or a size is left out only where that is the default's meaning."""
    noun = rng.choice(NOUN_WORDS.get(scene.noun, (scene.noun,)))
    if rng.random() < 0.15:
        noun = PLURALS.get(noun, noun + "s")
    colour = rng.choice(COLOUR_WORDS.get(scene.colour, (scene.colour,)))
    size = rng.choice(SIZE_WORDS[scene.size])
    templates = WITH_COLOUR
    if scene.colour == DEFAULT_COLOUR and rng.random() < 0.4:
        templates = WITHOUT_COLOUR
    elif size and rng.random() < 0.2:
        templates = SIZE_LAST
    prompt = _fill(rng.choice(templates), noun, size, colour)
    if rng.random() < 0.25:
        prompt = with_filler(prompt, rng)
    return prompt


def words() -> list[str]:
    """Every word a prompt can hold, sorted, lower case, without punctuation."""
    texts = [*WITH_COLOUR, *SIZE_LAST, *WITHOUT_COLOUR, FILLER, *PLURALS.values(), *NOUNS]
    for table in (SIZE_WORDS, COLOUR_WORDS, NOUN_WORDS):
        texts += [word for choices in table.values() for word in choices]
    texts += [PLURALS.get(noun, noun + "s") for name in NOUNS for noun in NOUN_WORDS.get(name, (name,))]
    texts += ["red blue green yellow purple orange pink white black a an"]
    found = set()
    for text in texts:
        for field in ("{a}", "{an}", "{thing}", "{noun}", "{size}", "{colour}"):
            text = text.replace(field, " ")
        found |= set(text.replace(",", " ").replace("-", " ").split())
    return sorted(found)


def _size_word(scene: Scene) -> str:
    return "" if scene.size == DEFAULT_SIZE else scene.size


def _fill(template: str, noun: str, size: str, colour: str) -> str:
    thing = f"{size} {noun}".strip()
    text = template.replace("{a} picture", "a picture")
    return text.format(a=article(thing), an=article(colour), thing=thing, noun=noun, size=size, colour=colour)


def article(following: str) -> str:
    """The indefinite article before a word."""
    return "an" if following[0] in "aeiou" else "a"


def with_filler(prompt: str, rng: random.Random) -> str:
    """The prompt with one or two words in it that mean nothing here."""
    parts = prompt.split()
    for _ in range(rng.randint(1, 2)):
        # One in three is a word no tokenizer knows.
        word = rng.choice(FILLER.split()) if rng.random() < 0.67 else "".join(rng.choices("bcdfghjklmpqrstvwxyz", k=5))
        parts.insert(rng.randint(0, len(parts)), word)
    return " ".join(parts)
