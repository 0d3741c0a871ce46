"""The models behind one endpoint: each with all that its requests need, and which of them a request means."""
