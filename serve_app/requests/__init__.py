"""What was asked: a body becomes GenerationRequests."""
