"""``hga demo``: dense and routed attention side by side, on a real model that fits a laptop."""
