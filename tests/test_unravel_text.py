"""What language models do besides returning logits for all of their tokens: fewer of them, losses, and generation."""

import logging
import warnings

import pytest
import torch
from architectures import CASES, Decoder, built, edited, small_transformer
from torch import nn
from torch.nn import functional as F
from unravelling import delete_each, evaluate, unravel


class WithTargets(nn.Module):
    """Returns logits and a loss; without targets, logits for the last position alone, as is usual for generation."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, tokens, targets=None):
        logits = self.decoder(tokens)
        if targets is None:
            return logits[:, [-1], :], None
        return logits, F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, (4, 6), generator=generator), torch.randint(11, (4, 6), generator=generator)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WithTargets().eval()


def test_a_model_that_takes_targets_is_measured_on_pairs(model, text):
    """The loss of every deletion is the model's own, with zeros for the branch."""
    tokens, targets = text
    chain = unravel(model, text)
    table = delete_each(chain, [(text, targets)])
    for i, unit in enumerate(chain.units):
        branch = model.get_submodule(unit.name)
        handle = branch.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
        with torch.no_grad():
            expected = model(tokens, targets)[1].item()
        handle.remove()
        assert table["loss"][i] == pytest.approx(expected, rel=1e-5)


def test_logits_of_the_last_position_alone_are_refused_where_every_token_has_a_label(model, text):
    tokens, targets = text
    chain = unravel(model, tokens)
    with pytest.raises(ValueError, match=r"the labels, have shape \(4, 6\) beside logits of shape \(4, 1, 11\)"):
        delete_each(chain, [(tokens, targets)])
    last = delete_each(chain, [(tokens, targets[:, -1:])])
    assert last["loss"].notna().all()


def greedy(network, tokens, steps=4):
    """Tokens ``(B, T)``, and after them those that a network thinks most probable, one after the other."""
    with torch.no_grad():
        for _ in range(steps):
            logits = network(tokens)
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("name", ["decoder", "transformers gpt2"])
def test_a_shortened_chain_generates_what_the_edited_model_does(name):
    case, model = CASES[name], built(name)
    chain = unravel(model, case.inputs())
    prompt = case.inputs(seed=5)[:1, :3]
    shortened = chain.without(1)
    assert torch.equal(greedy(shortened, prompt), greedy(edited(case, model, [1], value=0.0), prompt))
    for network in (chain, shortened):
        with pytest.raises(AttributeError, match=r"loop.*argmax"):
            network.generate(prompt)


OWN = {
    "BartForCausalLM": {"vocab_size": 11, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2,
                        "decoder_ffn_dim": 32, "max_position_embeddings": 16},
    "BertGenerationDecoder": small_transformer(is_decoder=True),
    "BertForMaskedLM": small_transformer(),
    "LlamaForCausalLM": small_transformer(num_key_value_heads=1),
}


class Wrapper(nn.Module):
    """Takes no labels, so that its own loss cannot be asked for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids).logits


def test_what_a_model_logs_when_it_is_asked_for_its_loss_is_not_heard(caplog):
    transformers = pytest.importorskip("transformers")

    class Loud(transformers.GPT2LMHeadModel):
        def forward(self, input_ids, labels=None):
            logging.getLogger("loud").warning("labels" if labels is not None else "no labels")
            return super().forward(input_ids, labels=labels, use_cache=False)

    tokens = torch.arange(12).view(2, 6) % 11
    model = Loud(transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    unravel(model, tokens)
    assert "labels" not in caplog.messages
    model(tokens, labels=tokens)
    assert "labels" in caplog.messages


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_labels_in_a_dict_are_scored_as_the_model_itself_does(name, wrapped):
    transformers = pytest.importorskip("transformers")
    stem = name.removesuffix("ForCausalLM").removesuffix("ForMaskedLM").removesuffix("Decoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = getattr(transformers, stem + "Config")(**OWN[name])
        model = getattr(transformers, name)(settings).eval()
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = unravel(Wrapper(model) if wrapped else model, {"input_ids": tokens})
    own = model(input_ids=tokens, labels=tokens).loss.item()
    assert evaluate(chain, [{"input_ids": tokens, "labels": tokens}])["loss"] == pytest.approx(own, rel=1e-4)
