"""What the application measures of itself: a table of metrics, and the meters that tell them."""
