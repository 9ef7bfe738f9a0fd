//! Numbered entries that can be referred to by tokens which go stale when their entry goes.

use std::collections::VecDeque;

/// Refers to one entry of a [`Slab`], and to no later one in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Token {
    index: u32,
    generation: u32,
}

impl Token {
    /// In 56 bits, as a descriptor's event data carries it: 24 bits of the generation are enough to tell an event from a stale one.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.index) | u64::from(self.generation & 0xff_ffff) << 32
    }

    /// The reverse of [`to_bits`](Self::to_bits).
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self {
            index: bits as u32,
            generation: (bits >> 32) as u32 & 0xff_ffff,
        }
    }
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// A bounded table.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    limit: usize,
}

impl<T> Slab<T> {
    /// A table for `limit` entries at most.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            limit,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Puts a value in, or gives `None` when the table is full.
    pub(crate) fn insert(&mut self, value: T) -> Option<Token> {
        if self.is_full() {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    value: None,
                });
                u32::try_from(self.slots.len() - 1).ok()?
            }
        };
        let slot = self.slots.get_mut(index as usize)?;
        slot.value = Some(value);
        Some(Token {
            index,
            generation: slot.generation,
        })
    }

    pub(crate) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let slot = self.slots.get_mut(token.index as usize)?;
        if slot.generation == token.generation {
            slot.value.as_mut()
        } else {
            None
        }
    }

    pub(crate) fn remove(&mut self, token: Token) -> Option<T> {
        let slot = self.slots.get_mut(token.index as usize)?;
        if slot.generation != token.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = (slot.generation + 1) & 0xff_ffff;
        self.free.push(token.index);
        Some(value)
    }

    /// All entries with their tokens.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Token, &mut T)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter_map(|(index, slot)| {
                let token = Token {
                    index: index as u32,
                    generation: slot.generation,
                };
                slot.value.as_mut().map(|value| (token, value))
            })
    }
}

impl<T> Slab<T> {
    /// Puts a token at the end of a queue of tokens. Stale ones are thrown out before the queue gets much longer than the table can be.
    pub(crate) fn enqueue(&mut self, queue: &mut VecDeque<Token>, token: Token) {
        if queue.len() >= self.limit * 2 {
            queue.retain(|token| self.get_mut(*token).is_some());
        }
        queue.push_back(token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_stale_with_their_entry() {
        let mut slab = Slab::new(2);
        let a = slab.insert('a').unwrap();
        assert_eq!(Token::from_bits(a.to_bits()), a);
        assert!(slab.insert('b').is_some() && slab.insert('c').is_none());
        assert_eq!(slab.remove(a), Some('a'));
        let c = slab.insert('c').unwrap();
        assert_eq!(slab.get_mut(a), None);
        assert_eq!(slab.get_mut(c), Some(&mut 'c'));
        assert_eq!((slab.remove(a), slab.len()), (None, 2));
    }

    #[test]
    fn queues_of_tokens_stay_short() {
        let mut slab = Slab::new(2);
        let mut queue = VecDeque::new();
        for n in 0..1000 {
            let token = slab.insert(n).unwrap();
            slab.enqueue(&mut queue, token);
            slab.remove(token);
        }
        assert!(queue.len() <= 4);
    }
}
