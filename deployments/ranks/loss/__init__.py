"""How a group of ranks ends: who has given up while others wait, and what the next group is told."""
