"""An exact model of six tasks, decoded by the real engine: what a rule costs when the model itself is never wrong."""
