"""The one place of the service that runs torch."""
