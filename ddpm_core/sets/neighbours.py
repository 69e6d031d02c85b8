"""Exact nearest neighbours of features, and in how many balls each lies, with the base given block by block.

A product of matrices in float32 with a bound on its rounding error screens the pairs; every pair that could matter is
decided by `exact_distances`, a function of its two features alone. So the result is the same for any blocks in any
order, any number of threads or workers, and any library of matrix products.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from ddpm_core.errors import ConfigError
from ddpm_core.sets.moments import check_finite

_QUERIES, _BASE = 512, 1024
"""Rows of a tile, whose products stay in the cache."""
_BLOCK = 16 * _BASE
"""Rows of the base of which a centred copy is made."""
_PAIR_VALUES = 1 << 17
"""Values of exact distances at a time, for the same reason."""
_UNIT = 2.0**-24
"""Unit round-off of float32."""
_TOO_LARGE = 1e37
"""Squares of norms from here on are not left to float32."""
_BEYOND = 3e38
"""Outweighs every product that is, and is itself finite in float32."""


def exact_distances(x: Float32[np.ndarray, "p d"], y: Float32[np.ndarray, "p d"]) -> Float64[np.ndarray, " p"]:
    """‖x_i - y_i‖ of each pair of rows, in float64; 0 exactly where they are equal, and symmetric.

    The sum over dimensions folds the last half onto the first until one is left: additions of whole arrays, whose order
    no library chooses.
    """
    squares = np.subtract(x, y, dtype=np.float64)
    np.square(squares, out=squares)
    width = squares.shape[1]
    while width > 1:
        half = width // 2
        squares[:, :half] += squares[:, width - half : width]
        width -= half
    found: Float64[np.ndarray, " p"] = np.sqrt(squares[:, 0])
    return found


class Neighbours:
    """The k nearest of a base for each of n queries, and the number of balls around base rows that hold the query.

    Memory: the queries twice, the lists, and for a tile of queries and base the products.
    """

    def __init__(
        self,
        queries: Float32[np.ndarray, "n d"],
        k: int,
        own_ids: Int64[np.ndarray, " n"] | None = None,
        num_radii: int = 0,
    ) -> None:
        """Of `queries` [n, d] the `k` >= 0 nearest (0: balls only). A base row with the id that `own_ids` [n] names for
        a query is no neighbour of it, nor does its ball count. `num_radii`: R, the number of columns in `add`.

        Raises ConfigError for features that are not finite.
        """
        n, d = queries.shape
        self._queries = check_finite(queries)
        self._own_ids = np.full(n, -1, np.int64) if own_ids is None else own_ids
        self._distances = np.full((n, k), np.inf)
        self._ids = np.full((n, k), -1, np.int64)
        self._inside = np.zeros((n, num_radii), np.int32)
        self._limits = np.full(n, np.inf)  # the k-th distance is not above it
        # γ of Higham (2002, lemma 3.1) for d + 1 products, twice, and 16 single roundings: more than is used below.
        self._slack = 2.0 * (d + 1) * _UNIT / (1.0 - (d + 1) * _UNIT) + 16.0 * _UNIT
        self._centre = queries.mean(0, dtype=np.float64) if n else np.zeros(d)
        centred, self._squares = self._screen_form(queries)
        self._lifted = np.concatenate([centred, np.ones((n, 1), np.float32)], 1)

    @property
    def distances(self) -> Float64[np.ndarray, "n k"]:
        """Of each query to its nearest base rows, ascending; inf where the base has fewer."""
        return self._distances

    @property
    def ids(self) -> Int64[np.ndarray, "n k"]:
        """Of those rows, the lower id first where distances are equal; -1 where the base has fewer."""
        return self._ids

    @property
    def inside(self) -> Int32[np.ndarray, "n R"]:
        """For each column of `radii` the number of base rows b with d(query, b) <= radii[b]."""
        return self._inside

    def add(
        self,
        ids: Int64[np.ndarray, " m"],
        features: Float32[np.ndarray, "m d"],
        radii: Float64[np.ndarray, "m R"] | None = None,
    ) -> None:
        """Take m more rows of the base: ids >= 0, each once in all blocks; `radii` [m, R], below 0 for no ball.

        Raises ConfigError for features that are not finite or of another size than the queries', and for radii of
        another number of columns than announced.
        """
        columns = 0 if radii is None else radii.shape[1]
        if features.shape[1] != self._queries.shape[1]:
            sizes = f"{features.shape[1]} and {self._queries.shape[1]}"
            raise ConfigError(f"features: of {sizes} dimensions; compare those of one extractor")
        if columns != self._inside.shape[1]:
            raise ConfigError(f"radii: {columns} columns are not the announced {self._inside.shape[1]}")
        check_finite(features)
        for start in range(0, len(ids), _BLOCK):
            rows = slice(start, start + _BLOCK)
            if self._distances.shape[1]:
                self._find(ids[rows], features[rows])
            if radii is not None and columns:
                self._count(ids[rows], features[rows], radii[rows])

    def _screen_form(self, features: Float32[np.ndarray, "m d"]) -> tuple[np.ndarray, np.ndarray]:
        """Centred features in float32 and the squares of their norms; zeros and -inf where these are too large."""
        centred = (features - self._centre).astype(np.float32)
        squares = np.einsum("nd,nd->n", centred, centred, dtype=np.float64)
        large = ~(squares < _TOO_LARGE)
        centred[large], squares[large] = 0.0, -np.inf
        return centred, squares

    def _lift(
        self, features: Float32[np.ndarray, "m d"], largest: Float64[np.ndarray, " m"] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What screens some rows of the base, [d + 1, m], and the squares of their norms.

        d² = ‖x‖² + ‖y‖² - 2 x·y. With what float32 rounds in centring, in the product and in its last column (γ times
        ‖x‖ ‖y‖ <= (‖x‖² + ‖y‖²)/2, for any order of the sums: Higham 2002, eq. 3.5), d <= limit implies
            x·y - (1 - s)‖y‖²/2 >= (1 - s)‖x‖²/2 - (1 + s) limit²/2.
        The term of y is one more column of the product, so a tile of products is compared with one number a row. Where
        the limit is the radius of y's ball, it belongs to y, too.
        """
        centred, squares = self._screen_form(features)
        column = (self._slack - 1.0) / 2.0 * squares
        if largest is not None:
            column += (1.0 + self._slack) / 2.0 * np.square(largest)
            column[largest < 0.0] = -np.inf
        column = np.clip(column, -_BEYOND, _BEYOND)
        return np.concatenate([centred, column[:, None].astype(np.float32)], 1).T, squares

    def _thresholds(self, rows: slice, limits: Float64[np.ndarray, " q"] | float) -> Float32[np.ndarray, "q 1"]:
        """What a product must reach for the pair to matter."""
        underflow = 2.0**-124 * self._lifted.shape[1]
        least = (1.0 - self._slack) / 2.0 * self._squares[rows] - (1.0 + self._slack) / 2.0 * np.square(limits)
        least = np.maximum(least - underflow, -_BEYOND).astype(np.float32)
        lower: Float32[np.ndarray, " q"] = np.nextafter(least, np.float32(-np.inf))
        return lower[:, None]

    def _upper_bounds(self, of_queries: np.ndarray, of_base: np.ndarray | float, products: np.ndarray) -> np.ndarray:
        """How far apart pairs with these squares of norms and products may be at most."""
        squared = (1.0 + self._slack) * of_queries + 2.0 * self._slack * of_base - 2.0 * products.astype(np.float64)
        squared += 2.0**-123 * self._lifted.shape[1]
        exact = np.isfinite(of_queries) & np.isfinite(of_base) & np.isfinite(products)
        return np.where(exact, np.sqrt(np.maximum(squared, 0.0)) * (1.0 + self._slack), np.inf)

    def _find(self, ids: Int64[np.ndarray, " m"], features: Float32[np.ndarray, "m d"]) -> None:
        """Take rows of the base into the lists of neighbours, a tile of queries after the other."""
        lifted, squares = self._lift(features)
        k = self._distances.shape[1]
        for start in range(0, len(self._queries), _QUERIES):
            rows = slice(start, min(start + _QUERIES, len(self._queries)))
            pairs = _Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
            for first in range(0, len(ids), _BASE):
                tile = slice(first, first + _BASE)
                products = self._lifted[rows] @ lifted[:, tile]
                if np.isinf(self._limits[rows]).any():
                    self._first_limits(rows, products, squares[tile], ids[tile])
                places = np.flatnonzero(products >= self._thresholds(rows, self._limits[rows]))
                query, place = np.divmod(places, products.shape[1])
                pairs = pairs.and_these(query, first + place, products.ravel()[places])
                if len(pairs.query) > 2 * k * len(products):
                    pairs = self._tightened(rows, pairs, squares, ids)
            if len(pairs.query):
                pairs = self._tightened(rows, pairs, squares, ids)
                self._take(start + pairs.query, pairs.place, ids, features)

    def _first_limits(self, rows: slice, products: np.ndarray, squares: np.ndarray, ids: np.ndarray) -> None:
        """A k-th distance from the products of one tile, each pair as far away as the bound on their errors allows."""
        k, width = self._distances.shape[1], products.shape[1]
        if width < k or np.isinf(squares).any():
            return
        order = np.argsort(ids)
        places = order[np.minimum(np.searchsorted(ids, self._own_ids[rows], sorter=order), width - 1)]
        own = np.flatnonzero(ids[places] == self._own_ids[rows])
        others = products.copy()
        others[own, places[own]] = -np.inf
        others.partition(width - k, axis=1)
        found = self._upper_bounds(self._squares[rows], float(squares.max()), others[:, width - k])
        self._limits[rows] = np.minimum(self._limits[rows], found)

    def _tightened(self, rows: slice, pairs: "_Pairs", squares: np.ndarray, ids: np.ndarray) -> "_Pairs":
        """The pairs that may still matter after the limits are lowered by what their products say."""
        k, count = self._distances.shape[1], rows.stop - rows.start
        others = ids[pairs.place] != self._own_ids[rows][pairs.query]
        pairs = pairs.where(others)
        order = np.argsort(pairs.query.astype(np.int16), kind="stable")
        query = pairs.query[order]
        first = np.searchsorted(query, np.arange(count))
        width = int(np.diff(first, append=len(query)).max())
        bounds = np.full((count, k + width), np.inf)
        bounds[:, :k] = self._distances[rows]
        bounds[query, k + np.arange(len(query)) - first[query]] = self._upper_bounds(
            self._squares[rows][query], squares[pairs.place[order]], pairs.product[order]
        )
        bounds.partition(k - 1, axis=1)
        self._limits[rows] = np.minimum(self._limits[rows], bounds[:, k - 1])
        return pairs.where(pairs.product >= self._thresholds(rows, self._limits[rows])[pairs.query, 0])

    def _take(self, query: np.ndarray, place: np.ndarray, ids: np.ndarray, features: np.ndarray) -> None:
        """Merge pairs into the lists by their exact distances."""
        k = self._distances.shape[1]
        touched, row = np.unique(query, return_inverse=True)
        distances = self._exact(query, place, features)
        rows = np.concatenate([np.repeat(np.arange(len(touched)), k), row])
        distances = np.concatenate([self._distances[touched].ravel(), distances])
        found = np.concatenate([self._ids[touched].ravel(), ids[place]])
        order = np.lexsort((found, distances, rows))
        rows = rows[order]
        ranks = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(touched)))[rows]
        nearest = order[ranks < k].reshape(-1, k)
        self._distances[touched], self._ids[touched] = distances[nearest], found[nearest]
        self._limits[touched] = np.minimum(self._limits[touched], self._distances[touched, -1])

    def _count(self, ids: np.ndarray, features: np.ndarray, radii: np.ndarray) -> None:
        """Count the balls around rows of the base that hold each query."""
        lifted, _ = self._lift(features, radii.max(1))
        for start in range(0, len(self._queries), _QUERIES):
            rows = slice(start, start + _QUERIES)
            thresholds = self._thresholds(rows, 0.0)
            for first in range(0, len(ids), _BASE):
                products = self._lifted[rows] @ lifted[:, first : first + _BASE]
                query, place = np.divmod(np.flatnonzero(products >= thresholds), products.shape[1])
                query, place = start + query, first + place
                others = ids[place] != self._own_ids[query]
                query, place = query[others], place[others]
                distances = self._exact(query, place, features)
                inside = (distances[:, None] <= radii[place]).astype(np.int32)
                firsts = np.flatnonzero(np.diff(query, prepend=-1))
                if len(firsts):
                    self._inside[query[firsts]] += np.add.reduceat(inside, firsts, axis=0)

    def _exact(self, query: np.ndarray, place: np.ndarray, features: np.ndarray) -> Float64[np.ndarray, " p"]:
        size = max(_PAIR_VALUES // features.shape[1], 1)
        found = np.empty(len(query))
        for start in range(0, len(query), size):
            part = slice(start, start + size)
            found[part] = exact_distances(self._queries[query[part]], features[place[part]])
        return found


class _Pairs(NamedTuple):
    """Pairs of a query, by its place in a tile, and a row of the base, by its place in a block, and their product."""

    query: Int64[np.ndarray, " p"]
    place: Int64[np.ndarray, " p"]
    product: Float32[np.ndarray, " p"]

    def and_these(self, query: np.ndarray, place: np.ndarray, product: np.ndarray) -> "_Pairs":
        return _Pairs(*(np.concatenate(both) for both in zip(self, (query, place, product), strict=True)))

    def where(self, kept: np.ndarray) -> "_Pairs":
        return _Pairs(*(each[kept] for each in self))
