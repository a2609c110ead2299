// A step as torch's runtime executes it, reckoned as by backend/costs/runtime.py: what ranks compute, send and wait for.

const KIND_AT = {F: 0, B: 1, I: 2, W: 3};

/** The actions of all ranks from their text: {run: [kind, stage, microbatch]}, {post: [message ...], peer}, {await: post's place}. */
function readActions(text) {
  return text.split("\n").map((line) => {
    const last = new Map();
    const next = (word) => {
      const [name, rise] = word.split(":"), now = (last.get(name) ?? -1) + Number(rise ?? 1);
      last.set(name, now);
      return [name, now];
    };
    return line.split(" ").filter(Boolean).map((word, place) => {
      if (word[0] === "A") return {await: place - Number(word.slice(1) || 1)};
      if (word[0] === "P") {
        const [sent, peer] = word.slice(1).split("/").reverse();
        return {post: sent.split(",").map((part) => messageOf(...next(part))), peer: peer ?? "all", place};
      }
      const [name, microbatch] = next(word);
      return {run: [name[0], Number(name.slice(1)), microbatch]};
    });
  });
}

const messageOf = (name, microbatch) => ({key: `${name}:${microbatch}`, boundary: Number(name.slice(1)), microbatch, gradient: name[0] === "g" ? 1 : 0});

/** The seconds of a stage as the runtime spends them: all of the first backward is for the weights, and none is split that cannot be. */
function asRun([forward, backward, inputs, weights], stage, splits) {
  if (stage === 0) return [forward, backward, 0, backward];
  return splits ? [forward, backward, inputs, weights] : [forward, backward, backward, 0];
}

class Run {
  /** stages: [device, host] each, the seconds of the kinds of steps; delays: of what crosses behind each stage; longer: the
   *  seconds by which the device takes longer for a step, by its name. */
  constructor(listed, stages, delays, splits, {posting}, longer = new Map()) {
    Object.assign(this, {delays, posting, longer, begun: new Map(), messages: new Map(), events: [], posted: []});
    this.seconds = stages.map(([device, host], i) => [asRun(device, i, splits), asRun(host, i, splits)]);
    this.ranks = listed.map((actions, number) => ({number, actions, next: 0, computed: 0, started: 0, hosted: 0, streams: new Map(), ends: new Map()}));
    while (this.ranks.map((rank) => this.goAsFarAsItCan(rank)).some(Boolean)) continue;
    if (this.ranks.some(({actions, next}) => next < actions.length)) throw new Error("the order of the schedule waits for itself");
  }

  /** A rank does things until it waits for another one; false where it did so already. */
  goAsFarAsItCan(rank) {
    let moved = false;
    while (this.advance(rank)) moved = true;
    return moved;
  }

  advance(rank) {
    const settled = this.settle(rank);
    if (rank.next >= rank.actions.length) return settled;
    const action = rank.actions[rank.next];
    if (action.await !== undefined) {
      if (!rank.ends.has(action.await)) return settled;
      rank.computed = Math.max(rank.computed, rank.ends.get(action.await));
    } else if (action.post) {
      rank.started += this.posting;
      if (!rank.streams.has(action.peer)) rank.streams.set(action.peer, {sent: 0, beginning: -1, last: -1, posted: []});
      const stream = rank.streams.get(action.peer);
      stream.posted.push([action, Math.max(rank.computed, rank.started)]);
      stream.last = action.place;
      this.settle(rank);
    } else this.run(rank, action.run);
    rank.next++;
    return true;
  }

  run(rank, [kind, stage, microbatch]) {
    const [device, host] = this.seconds[stage].map((parts) => parts[KIND_AT[kind]]);
    const start = Math.max(rank.computed, rank.started);
    rank.started += host;
    rank.hosted += host;
    const end = start + device + (this.longer.get(nameOf(kind, stage, microbatch)) ?? 0);
    rank.computed = Math.max(end, rank.started);
    this.events.push([kind, stage, microbatch, rank.number, start, rank.computed]);
    this.posted.push(Array.from(rank.streams.values(), ({last}) => last));
  }

  /** The seconds by which steps take longer, by their names, when messages under way slow them by a part. */
  slower(slowed) {
    return new Map(this.events.map(([kind, stage, microbatch, number, start], i) => {
      const device = this.seconds[stage][0][KIND_AT[kind]];
      const sent = Math.max(0, ...this.posted[i].map((place) => this.ranks[number].ends.get(place)));
      return [nameOf(kind, stage, microbatch), slowed * Math.min(device, Math.max(sent - start, 0))];
    }));
  }

  /** Posts begin and end, in the order of their stream, as far as the other ends of their messages have begun. */
  settle(rank) { return Array.from(rank.streams.values(), (stream) => this.goOn(rank, stream)).some(Boolean); }

  goOn(rank, stream) {
    let moved = false;
    while (stream.posted.length) {
      const [{post, place}, ready] = stream.posted[0];
      if (stream.beginning !== place) {
        stream.beginning = place;
        stream.sent = Math.max(ready, stream.sent);
        for (const message of post) {
          if (!this.begun.has(message.key)) this.begun.set(message.key, []);
          this.begun.get(message.key).push(stream.sent);
          this.messages.set(message.key, message);
        }
        moved = true;
      }
      if (post.some(({key}) => this.begun.get(key).length < 2)) return moved;
      stream.sent = Math.max(stream.sent, ...post.map((message) => this.endOf(message)));
      rank.ends.set(place, stream.sent);
      stream.posted.shift();
      moved = true;
    }
    return moved;
  }

  endOf({key, boundary}) { return this.delays[boundary] + Math.max(...this.begun.get(key)); }

  /** What the page draws. */
  timeline(title) {
    const events = this.events.sort((a, b) => a[4] - b[4] || a[3] - b[3]);
    const sent = Array.from(this.messages.values(), (message) => (
      [message.boundary, message.microbatch, message.gradient, Math.max(...this.begun.get(message.key)), this.endOf(message)]));
    return {title, ranks: this.ranks.length, events, sent, hosts: this.ranks.map(({hosted}) => hosted)};
  }
}

const nameOf = (kind, stage, microbatch) => `${kind}${stage}:${microbatch}`;

/** The run of steps that take longer while messages are under way, as these are where they slow nothing. */
function slowedRun(listed, stages, delays, splits, device) {
  const run = new Run(listed, stages, delays, splits, device);
  return device.slowed ? new Run(listed, stages, delays, splits, device, run.slower(device.slowed)) : run;
}
