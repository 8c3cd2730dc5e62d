"""Re-identification games against a channel: how often the right record is named, beside the certificate's bound.

    python -m benchmarks.reidentification [--releases 16384]

The client is an untrained network on scikit-learn's digits with a channel of width 8 whose projection spreads the
records as far as the clip allows (principal components, five times too long for it). The attacker knows its weights,
the noise's sigma and all N candidates, and names the likeliest (Neyman and Pearson 1933): no attack on one release
does better on average. The bound is Fano's, at the certificate's bits.
"""

from __future__ import annotations

import argparse
import math
from typing import Final

import torch
from torch import Tensor, nn

from benchmarks.setting import command_line, machine_line
from milkglass.attacks.matching import MatchingGame
from milkglass.client import Client
from milkglass.data import load
from milkglass.defenses.certificate import Certificate, certify
from milkglass.defenses.channel import Channel
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.information import gaussian_sigma_for_bits
from milkglass.randomness import drawing_from, public_source
from milkglass.server import Server
from milkglass.transcript import Knowledge, Pairs, Release, View
from milkglass.transports.local import LocalTransport

BITS: Final = (0.5, 1.0, 2.0, 4.0, 6.0)
CANDIDATES: Final = (256, 1024)
WIDTH: Final = 8
TOO_LONG: Final = 5.0


class Game:
    """A client with a channel of so many bits, so many records, and who attacks it."""

    def __init__(self, bits: float, candidates: int) -> None:
        clip = math.sqrt(WIDTH)
        self.x: Tensor = load(name="digits").take(torch.arange(candidates)).x
        self.channel = Channel(WIDTH, gaussian_sigma_for_bits(bits, WIDTH, clip), clip, "pca")
        with drawing_from(torch.Generator().manual_seed(0)):
            bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
            bottom, top = self.channel.around(bare, nn.Linear(16, 10), (16,))
        with torch.no_grad():
            self.channel.prepare(bare(self.x))
            bottom.get_submodule("channel").get_parameter("gain").mul_(TOO_LONG)
        server = LocalTransport(Server(top, None))
        self.client = Client(bottom, None, server, defenses=[self.channel], source=public_source(5))
        self.claimed: Certificate = certify([self.channel], (16,))

    @property
    def bound(self) -> float:
        """At most so often (0..1) is the right record named."""
        return next(each.bound for each in self.claimed.reidentification if each.candidates == len(self.x))

    def play(self, releases: int) -> tuple[int, int]:
        """(how often the right record was named, of how many releases); every record is released equally often."""
        right, rounds = 0, max(1, releases // len(self.x))
        nothing = torch.zeros(len(self.x), 0)
        knowledge = Knowledge(client=self.client.noise_free, noise_sigma=self.channel.sigma)
        for _ in range(rounds):
            z = self.client.release(self.x)
            pairs = Pairs(z, self.x, nothing)
            view = View(pairs, pairs, Release(z, nothing), "fresh", knowledge=knowledge)
            made = MatchingGame().attack(view, self.x)
            right += round(made.top1(torch.arange(len(self.x))) * len(self.x))
        return right, rounds * len(self.x)


def main() -> None:
    """Play all of them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--releases", type=int, default=16384)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    print("| bits a release | candidates | sigma | named right (95 % Clopper-Pearson) | chance | bound |")
    print("|---|---|---|---|---|---|")
    for candidates in CANDIDATES:
        for bits in BITS:
            game = Game(bits, candidates)
            found = clopper_pearson(*game.play(arguments.releases))
            print(
                f"| {bits:g} | {candidates:,} | {game.channel.sigma:.3g} | {found.value:.4f} ({found.low:.4f} to "
                f"{found.high:.4f}) | {1 / candidates:.4f} | {game.bound:.3f} |"
            )


if __name__ == "__main__":
    main()
