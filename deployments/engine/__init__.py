"""The step engine: one scheduler of forwards that knows no request and no pipeline."""
