import types

import torch

from optimum_sab.example.predictions import predict_learnt


def test_predict_learnt_reads_the_token_before_and_the_head_sees_no_other():
    seen = []

    def head(hidden):
        seen.append(hidden)
        return hidden.to(torch.bfloat16)

    hidden = torch.arange(12.0).view(2, 3, 2)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    learnt = torch.tensor([[True, False, True], [False, True, True]])
    predicted = predict_learnt(types.SimpleNamespace(lm_head=head), hidden, ids, learnt)
    assert predicted.targets.tolist() == [7, 9, 10]
    assert predicted.logits.dtype == torch.float32
    assert predicted.logits.tolist() == [[2.0, 3.0], [6.0, 7.0], [8.0, 9.0]]
    assert [len(each) for each in seen] == [3]
