"""One file a version, in the order that their `down_revision` gives."""
