"""The main job: `fastcontrast demo` trains a CLIP from scratch and measures what it learned and cost."""
