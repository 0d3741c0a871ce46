"""All stages of a model in this process, asked as Ray Serve's handles are: for one request on one's own machine."""
