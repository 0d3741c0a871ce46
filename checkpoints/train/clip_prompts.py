"""What a person might type for a clip: paraphrases, and words without a meaning for it."""

import random

from checkpoints.train.clips import Clip
from checkpoints.train.pictures import DEFAULT_COLOUR
from checkpoints.train.prompts import COLOUR_WORDS, NOUN_WORDS, article, with_filler
from checkpoints.train.prompts import words as picture_words

DEFAULT_DIRECTION = "right"  # what a prompt without a direction means

DIRECTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "left", "left", "to the left", "leftwards"),
    "right": ("right", "right", "right", "to the right", "rightwards"),
    "up": ("up", "up", "up", "upwards", "upward"),
    "down": ("down", "down", "down", "downwards", "downward"),
}
VERBS = ("moving", "moving", "moving", "going", "flying", "running", "walking", "sliding", "floating", "moves", "goes")

# {a}, {an}: the articles of noun and colour; {moving}: one of VERBS.
COMPLETE: tuple[str, ...] = (
    "{a} {noun} {moving} {direction} on {an} {colour} background",
    "{a} {noun} {moving} {direction} on {an} {colour} background",
    "{a} {noun} {moving} {direction} on {colour}",
    "{noun} {moving} {direction}, {colour} background",
    "{colour} background, {noun} {moving} {direction}",
    "{an} {colour} background with {a} {noun} {moving} {direction}",
    "on {colour}, {a} {noun} {moving} {direction}",
    "a video of {a} {noun} {moving} {direction} on {an} {colour} background",
    "{a} {noun} {moving} {direction} in front of {an} {colour} wall",
    "{noun} {direction} {colour}",
)
WITHOUT_COLOUR: tuple[str, ...] = (
    "{a} {noun} {moving} {direction}",
    "{noun} {direction}",
    "a video of {a} {noun} {moving} {direction}",
)
WITHOUT_DIRECTION: tuple[str, ...] = (
    "{a} {noun} on {an} {colour} background",
    "{a} {noun} moving on {colour}",
    "{colour} background, {noun}",
)
NOUN_ONLY: tuple[str, ...] = ("{noun}", "{a} {noun}", "a video of {a} {noun}", "{a} {noun} moving")


def plain_prompt(clip: Clip) -> str:
    """The clip in the words of the documentation: "a cat moving left on a blue background"."""
    return (
        f"{article(clip.noun)} {clip.noun} moving {clip.direction} on {article(clip.colour)} {clip.colour} background"
    )


def random_prompt(clip: Clip, rng: random.Random) -> str:
    """One way to ask for the clip; colour and direction are left out only where that is the defaults' meaning."""
    noun = rng.choice(NOUN_WORDS.get(clip.noun, (clip.noun,)))
    colour = rng.choice(COLOUR_WORDS.get(clip.colour, (clip.colour,)))
    no_colour = clip.colour == DEFAULT_COLOUR and rng.random() < 0.35
    no_direction = clip.direction == DEFAULT_DIRECTION and rng.random() < 0.2
    templates = {
        (False, False): COMPLETE,
        (True, False): WITHOUT_COLOUR,
        (False, True): WITHOUT_DIRECTION,
        (True, True): NOUN_ONLY,
    }[no_colour, no_direction]
    prompt = rng.choice(templates).format(
        a=article(noun),
        an=article(colour),
        noun=noun,
        moving=rng.choice(VERBS),
        direction=rng.choice(DIRECTION_WORDS[clip.direction]),
        colour=colour,
    )
    return with_filler(prompt, rng) if rng.random() < 0.2 else prompt


def words() -> list[str]:
    """Every word a prompt can hold, sorted, lower case, without punctuation."""
    texts = ["moving video with in front of wall", *VERBS]
    texts += [word for choices in DIRECTION_WORDS.values() for word in choices]
    return sorted({word for text in texts for word in text.split()} | set(picture_words()))
