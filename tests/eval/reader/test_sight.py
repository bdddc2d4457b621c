import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from optimum_sab.eval.reader.cifar import CLASSES, Pictures
from optimum_sab.eval.reader.sight import (
    CANDIDATES,
    CAPTION_TOKENS,
    Goal,
    Sight,
    SightSettings,
    enlarged,
    sight_batches,
    sight_loss,
    teach_sight,
)
from optimum_sab.eval.reader.tower import (
    GRID,
    HEADS,
    NEIGHBOUR_LAYERS,
    OFFSETS,
    TOKENS,
    WIDTH,
    initialize_tower,
    tower_config,
)

HIDDEN = 32


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    return Pictures(generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return SiglipVisionModel._from_config(tower_config(), attn_implementation="eager").eval()


def make_sight(tower):
    config = LlavaConfig(vision_config=tower_config().to_dict(), vision_feature_layer=-1)
    config.text_config.hidden_size = HIDDEN
    return Sight(tower, LlavaMultiModalProjector(config))


def test_sight_computes_what_the_tower_computes(tower):
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(make_sight(tower)(pixels)[2], expected, rtol=1e-4, atol=1e-4)


def test_initialize_tower_makes_heads_look_at_their_neighbours(tower):
    patches = torch.randn(4000, 192, generator=torch.Generator().manual_seed(1)).cumsum(1)
    inner = make_sight(tower).tower
    initialize_tower(inner, patches)
    positions = inner.embeddings.position_embedding.weight
    row, column = 3, 4
    for layer in inner.encoder.layers[:NEIGHBOUR_LAYERS]:
        hidden = layer.layer_norm1(positions)
        query = layer.self_attn.q_proj(hidden).unflatten(1, (HEADS, -1))[row * GRID + column]
        key = layer.self_attn.k_proj(hidden).unflatten(1, (HEADS, -1))
        for head, (down, right) in enumerate(OFFSETS):
            attended = (key[:, head] @ query[head]).argmax().item()
            assert attended == (row + down) * GRID + column + right


def test_initialize_tower_whitens_the_patches(tower):
    patches = torch.randn(4000, 192, generator=torch.Generator().manual_seed(1)).cumsum(1) + 5
    inner = make_sight(tower).tower
    initialize_tower(inner, patches)
    embedding = inner.embeddings.patch_embedding
    seen = patches @ embedding.weight.flatten(1).T + embedding.bias
    torch.testing.assert_close(seen.mean(0), torch.zeros(WIDTH), rtol=0, atol=1e-2)
    # Directions with almost no variance are not blown up, so the covariance is that of white noise only as a bound.
    assert torch.linalg.eigvalsh(seen.T.cov()).max() < 0.26


def test_sight_batches_say_what_is_in_the_pictures(pictures):
    settings = SightSettings(signs=5, pictures=4)
    batch = next(sight_batches(pictures, settings))
    assert batch.pixels.shape == (9, 3, 64, 64)
    assert batch.pixels.abs().max() <= 1
    for caption, words, letters in zip(batch.captions, batch.words, batch.letters, strict=False):
        said = {index for index in caption.tolist() if index}
        assert set(words.tolist()) - {0} == said
        spelt = {chr(ord("a") - 1 + each) for each in letters.tolist() if each}
        assert spelt <= {letter for index in said for letter in CANDIDATES[index].strip()}
        assert torch.equal(words > 0, letters > 0)
    for caption, label in zip(batch.captions[5:], batch.labels, strict=True):
        assert CANDIDATES[caption[0]].strip() == CLASSES[label]
        assert caption[1:].tolist() == [0] * (CAPTION_TOKENS - 1)


def test_enlarged_pictures_are_those_of_the_image_processor():
    # Away from black and white, where Pillow also cuts off between its two passes.
    pixels = np.random.default_rng(0).integers(60, 190, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)).astype(np.float32)
    ours = enlarged(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1


@pytest.mark.usefixtures("quick_muon")
def test_teach_sight_lowers_the_loss_of_what_it_was_shown(pictures, tower):
    settings = SightSettings(steps=4, signs=2, pictures=2, warmup=1)
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(len(CANDIDATES), HIDDEN, generator=generator)
    goal = Goal(embeddings, torch.randn(TOKENS - CAPTION_TOKENS, HIDDEN, generator=generator))
    sight, saved = make_sight(tower), []
    batch = next(sight_batches(pictures, settings))
    before = sight_loss(sight, batch, goal)[0].item()
    teach_sight(sight, pictures, goal, settings, lambda line: None, lambda: saved.append(1))
    assert sight_loss(sight, batch, goal)[0].item() < before
    assert saved == [1]


def test_sight_loss_of_perfect_tokens_counts_every_caption_as_right(pictures, tower):
    batch = next(sight_batches(pictures, SightSettings(signs=3, pictures=3)))
    embeddings = torch.eye(len(CANDIDATES))

    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            helper = make_sight(tower)
            self.letter_head, self.word_head, self.picture_head = (
                helper.letter_head,
                helper.word_head,
                helper.picture_head,
            )
            self.connector = torch.nn.Identity()

        def forward(self, pixels):
            middle = torch.zeros(len(pixels), TOKENS, WIDTH)
            tokens = torch.zeros(len(pixels), TOKENS, len(CANDIDATES))
            tokens[:, -CAPTION_TOKENS:] = embeddings[batch.captions]
            return middle, middle, tokens

    assert sight_loss(Perfect(), batch, Goal(embeddings))[1].all()
