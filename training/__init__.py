"""Offline: from a preset and a data set to a verified artifact in the store. Of `app` it imports only the contract."""
