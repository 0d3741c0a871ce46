"""The other ways to serve the same pipeline that benchmarks.side_by_side measures beside this project."""
