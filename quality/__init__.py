"""What the presets reach on MNIST, measured beside baselines: `make quality`. No part of what is installed."""
