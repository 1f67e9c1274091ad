"""From trained weights to calibrated ones: scalar, margins, temperatures."""
