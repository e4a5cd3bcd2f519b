"""Statistics of activations and saliencies, collected on calibration data."""
