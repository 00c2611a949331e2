"""Train several adapters side by side, with one pass of the base for all of them.

Read ``callback`` (what is checked, and the life of a run), ``module`` (each adapter's view of the LightningModule, and
its optimizer), ``meeting`` (how the steps meet at the network), then ``stacking`` (which calls can share a pass).
"""
