"""An example of a user's file; .ci/wheel type-checks it against the installed package."""

import lightning as L

import lightning_peft as lp

trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets="all-linear", trainable=["classifier"])])
report: lp.Report = lp.inspect(L.LightningModule(), lp.LoHa(r=4))
percent: float = 100 * report.trainable / report.total

# A type checker must find these mistakes: if the package had no types, the ignore comments would be unused, an error.
lp.LoRA(r="8")  # type: ignore[arg-type]
lp.LoRa(r=8)  # type: ignore[attr-defined]
