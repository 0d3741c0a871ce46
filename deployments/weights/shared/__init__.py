"""Components that several models of one process have in common: held once where they are proved to be equal."""
