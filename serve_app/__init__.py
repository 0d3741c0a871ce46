"""HTTP in, stored media out: the ingress and the application it is bound into. Imports no torch."""
