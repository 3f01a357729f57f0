"""The contract between training and serving: manifest, store, calibration, and how a picture becomes an input."""
