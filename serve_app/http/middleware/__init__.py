"""What surrounds every request, before a route sees it."""
