"""Requests that outlive their HTTP connection and the process that took them: a durable store and its runners."""
