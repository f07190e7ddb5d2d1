"""`fastcontrast generate`: a small language model continues a text, by any of the library's ways of decoding."""
