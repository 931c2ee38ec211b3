"""What Hydra finds of diffmia_exp: a sweeper and two launchers.

Hydra runs these modules before it lists them in sys.modules: dataclasses in them cannot have annotations from __future__.
"""
