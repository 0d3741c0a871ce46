"""The check that the split makes what the unsplit pipeline makes, for any checkpoint: one small request, both ways.

Read in this order: verdict (what is found), process (the check as a process of its own), check (the whole of it), whole
(the unsplit pipeline and the stages over the same weights), request (what is asked), unsplit (the truth), split (the
request through the stages), checks (a method for each verdict).
"""
