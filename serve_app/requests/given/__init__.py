"""Files that come with a body: what names them, where their bytes are, and what is read out of them."""
