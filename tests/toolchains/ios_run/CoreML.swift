// What the samples use of Apple's Core ML, declared as Apple documents it. There is no model behind: `Classifier.mlmodelc` is a folder with
// `model.json`, and `answers`, one line of numbers for each prediction; what was fed is added to the file `fed` there.
import CoreVideo
import Foundation

public enum MLComputeUnits: Int, Sendable { case cpuOnly = 0, cpuAndGPU = 1, all = 2, cpuAndNeuralEngine = 3 }
public enum MLFeatureType: Int, Sendable { case invalid, int64, double, string, image, multiArray, dictionary, sequence, state }
public enum MLMultiArrayDataType: Int, Sendable { case double = 0x10040, float32 = 0x10020, float16 = 0x10010, int32 = 0x20020 }

public class MLModelConfiguration: NSObject {
    public var computeUnits: MLComputeUnits = .all
}

public class MLFeatureDescription: NSObject {
    public let name: String, type: MLFeatureType
    init(_ name: String, _ type: MLFeatureType) { (self.name, self.type) = (name, type) }
}

public class MLModelDescription: NSObject {
    public let inputDescriptionsByName: [String: MLFeatureDescription]
    init(_ inputs: [String: MLFeatureDescription]) { inputDescriptionsByName = inputs }
}

public class MLMultiArray: NSObject {
    public let shape: [NSNumber], dataType: MLMultiArrayDataType
    private var values: [Float]

    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        (self.shape, self.dataType) = (shape, dataType)
        values = [Float](repeating: .nan, count: shape.reduce(1) { $0 * $1.intValue })
    }
    public var count: Int { values.count }
    public subscript(idx: Int) -> NSNumber {
        get { NSNumber(value: values[idx]) }
        set { values[idx] = newValue.floatValue }
    }
}

public class MLFeatureValue: NSObject {
    public let multiArrayValue: MLMultiArray?, imageBufferValue: CVPixelBuffer?

    public init(pixelBuffer value: CVPixelBuffer) { (multiArrayValue, imageBufferValue) = (nil, value) }
    public init(multiArray value: MLMultiArray) { (multiArrayValue, imageBufferValue) = (value, nil) }
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws { values = dictionary.compactMapValues { $0 as? MLFeatureValue } }
    public var featureNames: Set<String> { Set(values.keys) }
    public func featureValue(for featureName: String) -> MLFeatureValue? { values[featureName] }
}

public class MLPredictionOptions: NSObject {}

public class MLModel: NSObject {
    private struct Told: Decodable { let input: String, isImage: Bool, output: String }
    private let told: Told, folder: URL
    private var answers: [[Float]]

    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
        folder = url
        told = try JSONDecoder().decode(Told.self, from: Data(contentsOf: url.appendingPathComponent("model.json")))
        let text = try String(contentsOf: url.appendingPathComponent("answers"), encoding: .utf8)
        answers = text.split(separator: "\n").map { $0.split(separator: " ").map { Float(String($0))! } }
        try "\(configuration.computeUnits)".write(to: url.appendingPathComponent("units"), atomically: false, encoding: .utf8)
    }

    public var modelDescription: MLModelDescription {
        MLModelDescription([told.input: MLFeatureDescription(told.input, told.isImage ? .image : .multiArray)])
    }

    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        let value = input.featureValue(for: told.input)
        let array = value?.multiArrayValue.map { array in (0..<array.count).map { array[$0].floatValue } } ?? []
        let fed = value?.imageBufferValue.map { Data($0.pixels()) } ?? array.withUnsafeBytes { Data($0) }
        let place = folder.appendingPathComponent("fed")
        try (((try? Data(contentsOf: place)) ?? Data()) + fed).write(to: place)
        let answer = answers.removeFirst()
        let given = try MLMultiArray(shape: [1, NSNumber(value: answer.count)], dataType: .float32)
        for (i, number) in answer.enumerated() { given[i] = NSNumber(value: number) }
        return try MLDictionaryFeatureProvider(dictionary: [told.output: MLFeatureValue(multiArray: given)])
    }

    /// The one that an app must not get by accident: it waits in another way.
    public func prediction(
        from input: any MLFeatureProvider, options: MLPredictionOptions = MLPredictionOptions()
    ) async throws -> any MLFeatureProvider { fatalError("not asked here") }
}
