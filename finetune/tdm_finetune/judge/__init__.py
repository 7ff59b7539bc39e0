"""A second judge of pictures, which is never a reward.

A generator that is trained against a checker can learn to please the checker instead of making better pictures. Then
the checker's score rises and that of a judge that took no part does not. This one shares no code with `scenes.check`:
a small detector that was trained on drawn scenes names the objects, Tesseract reads the words, and whether that is what
a prompt asked for is decided afresh. Of the gain that the strict score shows, this judge must see at least 0.8.

`verdict(picture, spec)` uses the weights that ship with the package; `accuracy.json` beside them says how often it is
right on pictures that are known to be true or false. `tdm-serve finetune judge` trains it.
"""

from tdm_finetune.judge.verdict import Judge, shipped, verdict, verdicts

__all__ = ["Judge", "shipped", "verdict", "verdicts"]
