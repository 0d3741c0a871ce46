"""The part of a pipeline that one stage runs: any classic diffusers pipeline, split with no code per model.

Read in this order: roles (which stage needs which component), skeleton and loading (what a process holds),
sessions/session (one request), sessions/encode -> denoise -> decode (what each stage does), hand_off (to the VAE
stage, as a message), remote_calls (the exception).
"""
