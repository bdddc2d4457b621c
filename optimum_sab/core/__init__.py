"""The mathematics, in plain torch: Hessians, saliency, significance, binary planes, feedback, refit, target.

Nothing here knows a model, a file or Transformers. Notation follows docs/method.md: a linear's weight is
``W [out, in]``, a Hessian ``H [in, in]``, and a "block" is a run of ``block_size`` input columns.
"""
