"""One request in one stage: the pipeline's own call, with its component calls routed."""
