"""shapes-rvos: seeded videos of moving shapes with questions about them, in the layout of Ref-DAVIS.

scene.py draws what happens ─► render.py makes frames and masks ────────────────► files.py writes videos, annotations and questions
                            └► visibility.py ─► language.py asks and answers ───┘
outlines.py: what the shapes look like, for both
"""
