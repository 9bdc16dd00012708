"""TFLite files for LiteRT, written, quantised, cut and read."""
