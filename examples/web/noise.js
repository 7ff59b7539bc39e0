// A seed's noise: the numbers of torch.Generator("cpu").manual_seed(seed) and torch.randn, to float32's rounding.

// The Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). Of a seed its lowest 32 bits count, as in torch.
function twister(seed) {
  const N = 624, M = 397;
  const state = new Uint32Array(N);
  state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
  for (let i = 1; i < N; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let place = N;
  const renew = () => {
    for (let i = 0; i < N; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
      state[i] = state[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    place = 0;
  };
  return () => {
    if (place === N) renew();
    let y = state[place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

// `count` numbers, at least 16. torch draws them all evenly in [0, 1), and then turns sixteens into normal ones (Box
// and Muller); where 16 does not divide the count, the last sixteen are drawn anew.
export function noise(seed, count) {
  const random = twister(seed);
  const even = () => (random() & 0xffffff) / 0x1000000;
  const values = Float32Array.from({ length: count }, even);
  for (let start = 0; start + 16 <= count; start += 16) toNormal(values.subarray(start, start + 16));
  if (count % 16) {
    const last = values.subarray(count - 16);
    last.set(Array.from({ length: 16 }, even));
    toNormal(last);
  }
  return values;
}

function toNormal(sixteen) {
  for (let i = 0; i < 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - sixteen[i]));
    const angle = 2 * Math.PI * sixteen[i + 8];
    sixteen[i] = radius * Math.cos(angle);
    sixteen[i + 8] = radius * Math.sin(angle);
  }
}
