"""layerlens: at which layer should you intervene?"""

__version__ = "0.1.0"
