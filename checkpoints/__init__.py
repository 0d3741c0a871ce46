"""The small trained models that ship with the project, and how they were trained."""
