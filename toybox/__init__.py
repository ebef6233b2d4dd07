"""The small world that everything is proven on: object pictures, scenes, judge and weights."""
