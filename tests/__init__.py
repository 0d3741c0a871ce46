"""Tests: they mirror the tree and compare with truths that are not ours."""
