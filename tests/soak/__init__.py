"""`make soak`: hours of mixed traffic with bad input, reloads, killed workers and clients that leave."""
