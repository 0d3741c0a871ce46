"""The versions of the job store's tables, for alembic; serve_app.jobs.database applies them at start."""
