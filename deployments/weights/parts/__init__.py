"""Components from elsewhere: a checkpoint with others in place of its own, and the pipeline that takes them."""
