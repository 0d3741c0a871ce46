"""The part of a pipeline that one stage runs: any classic diffusers pipeline, split with no code per model.

Read in this order: roles (who is who), skeleton and loading (what a process holds), session (one request),
encode_session -> denoise_session -> decode_session (what each stage does), remote_calls (the exception).
"""
