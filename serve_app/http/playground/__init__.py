"""The page at `/`: make pictures, videos and sound in a browser, and watch the cluster."""
