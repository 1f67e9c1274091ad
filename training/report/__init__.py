"""What a calibrated network achieves on the test part: figures, page, tables."""
