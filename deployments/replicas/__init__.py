"""The Serve deployments of the stages. Only this room knows Ray."""
