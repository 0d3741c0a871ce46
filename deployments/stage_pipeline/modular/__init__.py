"""Modular pipelines: their blocks as data, and a class that is called like any other pipeline.

Read in this order: index (what a folder holds), signature (the blocks' inputs as one call), blocks (which of them
need which model), pipeline (the class that the stages load and call).
"""
